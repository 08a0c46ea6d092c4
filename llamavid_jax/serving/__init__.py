"""The model behind OpenAI's protocol: `app` the routes, `prepare` a request's row, `engine` the running batch."""
