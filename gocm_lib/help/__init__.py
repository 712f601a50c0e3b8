"""What a user reads: a file a topic, in Markdown, and how it is shown in a terminal, in man, and in a browser.

Promises that all three show the same sources. Imports nothing of ours.
"""
