"""LLaVA's entry point for training. The attention backend is a flag here, so it only calls `train`."""

from llava.train.train import main

if __name__ == "__main__":
    main()
