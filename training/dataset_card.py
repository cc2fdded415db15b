def write_cards(output):
    pass
