"""From frames and a question to an answer: `processor` the inputs, `model` the public class, `encode`, `generate`."""
