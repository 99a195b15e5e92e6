"""What an exported bundle can do, measured through the runtime that devices use: one file a metric."""
