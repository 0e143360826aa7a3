bpfree_api = 1
