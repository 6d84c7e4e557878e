"""One graph in the runtime of this environment, for ``runtimes.py``; needs NumPy and that runtime only.

python benchmarks/run_graph.py GRAPH RUNTIME PRECISION ROWS OUT
"""

import sys

import numpy as np

from clipship.core.machine.runtimes import OnnxRuntimeEncoder, open_encoder


def main(graph: str, runtime: str, precision: str, rows: str, out: str) -> None:
    """Run ``graph`` on the rows in ROWS (.npy) as a server would, and write what it gives to OUT (.npz)."""
    run, given = open_encoder(graph, runtime, precision), np.load(rows)
    if isinstance(run, OnnxRuntimeEncoder):
        outputs = run.session.run(None, {run.session.get_inputs()[0].name: given})
    else:
        outputs = [run(given)]
    np.savez(out, *(one.astype(str) if one.dtype == object else one for one in outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
