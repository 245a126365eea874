"""What the classification and the segmentation probe share: a frozen tower, a stream of samples, one training loop."""
