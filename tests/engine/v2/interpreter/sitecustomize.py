"""First on PYTHONPATH, with TRITON_INTERPRET=1, this lets vLLM's CPU build run its V2 model runner under Triton's interpreter.

vLLM asks Triton for an active backend and a CPU build has none; one that claims to be active is enough, for the interpreter
compiles nothing.
"""

import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)
