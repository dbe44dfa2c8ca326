"""What is wrong with a network, if anything, and what a change of its solver will cost."""
