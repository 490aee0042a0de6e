"""Every test runs on eight fake CPU devices; annotated shapes and dtypes are checked at every call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

from jaxtyping import install_import_hook

_hook = install_import_hook("anyexperts_jax", "typecheck.check")
