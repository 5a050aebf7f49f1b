"""Everything that knows Megatron-Core: where layers live, how a model is split, run, trained and stored."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core warns once of every optional accelerator package that is not installed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401
