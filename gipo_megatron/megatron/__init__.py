"""Everything that knows Megatron-Core: where layers live, how a model is split, run, trained and
stored."""

import warnings

from gipo_megatron import capabilities, environment

environment.set_defaults()  # for tests and tools; the launchers do it before torch is imported

with warnings.catch_warnings():
    # Megatron-Core warns once of every optional accelerator package that is not installed
    warnings.simplefilter("ignore")
    try:
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    except Exception as error:
        if not capabilities.raised_inside("transformer_engine", error):
            raise
        # A ModuleNotFoundError in Transformer Engine leaves Megatron-Core without it; any other
        # error of it comes through.
        raise capabilities.broken_transformer_engine(capabilities.one_line(error)) from error
