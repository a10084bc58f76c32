"""One file per recurrent cell: how a module's step is made of slots, writes and links."""
