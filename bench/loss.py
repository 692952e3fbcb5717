def loss():
    pass
