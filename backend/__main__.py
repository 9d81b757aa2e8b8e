"""``python -m fastft`` is the command ``fastft``."""

import os
import sys

# `python -m` puts the current folder first on the path. In a checkout, kernels/ there would pass for the Hub's package
# of that name, which transformers and bitsandbytes look for.
if sys.path[0] == os.getcwd():
    del sys.path[0]

from fastft.cli import main

if __name__ == "__main__":
    main()
