"""What reads listed rows only: the loss over hidden patches, arg-max over a vocabulary, gathers.

linear_cross_entropy.py is the MIM head's loss: chunks.py runs it some rows of logits at a time, on
softmax_cross_entropy.py. linear_argmax.py is the best of many scores without the scores.
gather_norm.py takes listed rows through a norm and scatter_norm.py brings their gradients back,
for the loss and for gather_rows.py, which is rows as they are.
"""
