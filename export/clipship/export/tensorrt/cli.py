"""``clipship engine``."""

from __future__ import annotations

from pathlib import Path

import click

from clipship.core.bundle import read_bundle
from clipship.core.cli.main import emit, existing_folder, json_option, require_packages
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.tensorrt_plan import BatchProfile, PlanRuntime, TensorRtPlan, read_plan

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="The plan's folder, replaced as a whole.")
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="The plan's runtime. Triton loads plans of tensorrt; tensorrt-rtx builds without a GPU.",
)
@click.option(
    "--gpu", "gpus", multiple=True, help="Compute capability like sm89; several with tensorrt-rtx. [default: this GPU]"
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="The variant of the bundle's image encoder to build from.",
)
@click.option("--min-batch", default=1, show_default=True, help="The smallest batch.")
@click.option("--opt-batch", type=int, help="The batch it is tuned for. [default: 8, or the nearest within the limits]")
@click.option("--max-batch", default=64, show_default=True, help="The largest batch.")
@click.option("--optimization-level", default=3, show_default=True, help="0 to 5: how long to search for fast kernels.")
@click.option("--workspace-mib", type=int, help="Limit of scratch memory on the GPU. [default: none]")
@click.option("--timing-cache", type=_PATH, help="A file that keeps measured kernel times between builds.")
@click.option("--strip-weights", is_flag=True, help="A small plan without weights; --refit puts them back.")
@click.option("--version-compatible", is_flag=True, help="The plan also runs on later TensorRT versions.")
@click.option("--hardware-compatible", is_flag=True, help="The plan runs on every GPU since Ampere, more slowly.")
@click.option("--refit", type=_PATH, help="Do not build: put BUNDLE's weights back into this stripped plan.")
@json_option
def engine(
    bundle: Path,
    out: Path,
    runtime: PlanRuntime,
    gpus: tuple[str, ...],
    precision: Precision,
    min_batch: int,
    opt_batch: int | None,
    max_batch: int,
    optimization_level: int,
    workspace_mib: int | None,
    timing_cache: Path | None,
    strip_weights: bool,
    version_compatible: bool,
    hardware_compatible: bool,
    refit: Path | None,
    as_json: bool,
) -> None:
    """Build the TensorRT plan of BUNDLE's image encoder.

    Before it is built, the parsed network is compared with the ONNX graph, type by type. plan.json says where the plan
    runs.

    Example: clipship engine bundles/prints --runtime tensorrt-rtx --gpu sm89 --precision fp16 --out plans/prints
    """
    require_packages("export", "torch", "onnx")
    from clipship.export.tensorrt.build import Settings, plan_from_bundle, refit_plan
    from clipship.export.tensorrt.runtime import load_runtime

    opened = read_bundle(existing_folder(bundle, "a bundle that clipship pack wrote"))
    if refit:
        _emit(refit_plan(read_plan(refit), opened, out), as_json=as_json)
        return
    best = max(min_batch, min(8, max_batch)) if opt_batch is None else opt_batch
    settings = Settings(
        gpus=gpus,
        profile=BatchProfile(min=min_batch, opt=best, max=max_batch),
        optimization_level=optimization_level,
        workspace_mib=workspace_mib,
        timing_cache=timing_cache,
        strip_weights=strip_weights,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    plan = plan_from_bundle(opened, out, load_runtime(runtime), precision=precision, settings=settings)
    _emit(plan, as_json=as_json)


def _emit(plan: TensorRtPlan, *, as_json: bool) -> None:
    info = plan.info
    batches = f"batches {info.profile.min} to {info.profile.max}"
    size = f"{info.plan_bytes / 1e6:.1f} MB in {info.build_s:.1f} s"
    made = f"{info.precision} for {', '.join(info.gpus)}, {batches}, {size}"
    line = f"{plan.path}: {info.runtime} {info.runtime_version}, {made}"
    emit({"plan": str(plan.path), **info.to_json()}, line, as_json=as_json)
