"""Places that methods are put into, one folder each.

A host is a module `host.py` with: `ACCEPTS`, one phrase for what it takes; `matches(model)`; `describe(model) -> ModelInfo`;
`refusals(method) -> list[str]`, why it cannot run a kind of method; `attach(model, methods, info, handle)`, which makes every change
through the handle. Methods are known by their protocol only. A host whose models are no text models also has `plain_model() -> ModelInfo`, one of
theirs without any speciality, which `accel ls` tries methods on. `identity.py` and `bound.py` are shared by the hosts.
"""
