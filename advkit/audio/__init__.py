"""Speech: recognisers by name, what they hear, and how it is measured."""
