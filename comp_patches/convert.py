"""`python -m comp_patches.convert SOURCE OUT`: the command is `comp_patches.commands.convert`."""

if __name__ == "__main__":
    from comp_patches.commands.convert import main

    main()
