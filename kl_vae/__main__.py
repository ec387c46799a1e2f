"""`python -m kl_vae COMMAND`, and `torchrun -m kl_vae COMMAND`."""

import sys

from kl_vae.cli.main import main

sys.exit(main())
