"""`python -m comp_patches.show_alignment MODEL IMAGE OUT.png`: the command is in `comp_patches.commands`."""

if __name__ == "__main__":
    from comp_patches.commands.show_alignment import main

    main()
