"""The entry point in `vllm.general_plugins`: vLLM calls `register` in the API server, the engine core and every worker."""


def register() -> None:
    """Lets vLLM recognise our adapters in a speculative configuration; may be called any number of times.

    Nothing else of vLLM is touched before such an adapter is selected, and no runner is imported: that would initialise the
    device in
    a process that may still fork.
    """
    from vllm_mtp import compat

    compat.recognise_adapters()
