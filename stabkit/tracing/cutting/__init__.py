"""Where a flow begins and ends, where its steps are cut, and what they are called."""
