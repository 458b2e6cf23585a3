"""OpenAI's batches: a file of requests becomes jobs, and their ends become files again.

status.py      the states, who moves a batch            lines.py       a line read, a line written;
pure repository.py  all SQL                                   views.py       the objects on the
wire; pure service.py     create, look, cancel, retry_failed        caretaker.py   everything that
takes longer than a request
"""
