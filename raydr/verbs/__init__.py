"""The verbs: embed, index, search, evaluate, and `reproduce`, which runs them in order. Configuration in, artifact out.

One YAML describes a whole run and every verb reads the part it needs, so `jobs/embed.py run.yaml` followed by
`jobs/index.py run.yaml` is the same as letting `jobs/reproduce.py run.yaml` do both. The jobs and the `raydr` command
call these functions and nothing else.
"""
