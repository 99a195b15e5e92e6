"""Training: the storybook data set, the two stages, and the evaluation of exported bundles."""
