"""From the spool to Google: claims what is due, sends it from several processes, settles what became of it.

Never speaks with the front: both meet in the state.
"""
