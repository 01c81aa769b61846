"""The verbs of the pipeline: each reads artifacts and writes one."""
