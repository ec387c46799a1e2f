"""`kl-vae encode` from a checkout, without installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kl_vae.cli.main import main  # noqa: E402

if __name__ == "__main__":  # data workers that are not forked import this file
    sys.exit(main(command="encode"))
