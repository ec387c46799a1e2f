"""`python -m kl_vae.cli COMMAND`."""

import sys

from kl_vae.cli.main import main

sys.exit(main())
