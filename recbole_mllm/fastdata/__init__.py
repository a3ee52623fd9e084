# SHIM package of shims alone
