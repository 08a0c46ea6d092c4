"""From frames and a prompt to an answer: `encode` the frames, `generate` the ids, with `sampling` and `stopping`."""
