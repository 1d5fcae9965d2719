"""``python -m lightning_hift`` is ``lightning-hift``."""

from lightning_hift.cli import main

if __name__ == "__main__":
    main()
