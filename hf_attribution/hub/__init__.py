"""Artefacts on the Hub: tables that its viewer shows, a card, and back again.

Imported when something is pushed or pulled: it needs `huggingface_hub` and `datasets`, the package itself does not.
"""
