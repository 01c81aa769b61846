"""`python -m edgeft` is the same as `edgeft`."""

from edgeft.cli import main

if __name__ == "__main__":
    main()
