"""The only home of transformers and peft."""

import logging

# peft imports bitsandbytes wherever it is installed, which then recommends kernels to runs that quantise nothing
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
