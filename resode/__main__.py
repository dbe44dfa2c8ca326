"""`python -m resode`, which torchrun can start too."""

from resode.cli import main

if __name__ == "__main__":
    main()
