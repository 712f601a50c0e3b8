"""From the spool to Google: claims what is due, sends it from several processes, settles what became of it.

Never imports the front: the two meet in the state.
"""
