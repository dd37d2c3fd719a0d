"""``python -m longctx.cli`` is the command ``longctx``."""

from longctx.cli.main import main

if __name__ == "__main__":
    main()
