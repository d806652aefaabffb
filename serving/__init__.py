"""What `serve.py` and `recommend.py` are made of, below their command lines.

For the web: `app.py` says which address does what, `requests.py` what a request may look like, `gate.py` what is
refused unread, `batching.py` how requests share a batch, `service.py` what the recommender is asked, `metrics.py` what
is counted, `page.html` what people see. For files: `jsonl.py` reads histories, `answers.py` ranks for them,
`parts.py` keeps what is written through a kill, `processes.py` shares the work. For feature files of any length:
`assignment.py` writes their codes in shards.
"""
