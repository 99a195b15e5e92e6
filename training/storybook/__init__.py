"""The storybook data set: drawn pictures with stories about them, which anybody can rebuild."""
