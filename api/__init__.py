"""The HTTP face: OpenAI routes, tokenizer, chat templates, detokenizer, streaming. No torch, no Ray, no transformers.

`app.build_app` is the way in; `backend.Backend` is what the routes need from the rest of the cluster.
"""
