"""What `python -m llava.train.plan` knows of a run before it is started."""
