"""`python -m comp_patches.export CHECKPOINT OUT`: the command is `comp_patches.commands.export`."""

if __name__ == "__main__":
    from comp_patches.commands.export import main

    main()
