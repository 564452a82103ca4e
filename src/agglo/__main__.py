"""``python -m agglo``, which is what torchrun starts: ``torchrun --nproc_per_node 8 -m agglo train RECIPE``."""

from agglo.cli.main import main

if __name__ == "__main__":
    main()
