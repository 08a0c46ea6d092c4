"""From frames and a question to an answer: `processor` (inputs), `model` (the public class), `encode`, `generate`."""
