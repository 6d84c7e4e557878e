"""From a bundle to a Triton repository, a server, a client and batch jobs. Imports ``clipship.core`` only."""
