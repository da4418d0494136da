"""What crosses a process boundary: requests, tickets, grants, manifests, messages, events, errors.

Floor 0: standard library, msgspec and nothing else. No torch, no Ray, no sockets.
"""
