"""A page read as a browser reads it: which elements and texts it has, and text that tries to become markup."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


ALLOWED = {"meta"} | set(
    "html head title style body main header div p h1 h2 h3 h4 h5 ul li article table caption thead tbody tr th td figure "
    "figcaption details summary section span small pre svg path text g rect use defs clippath".split()
)


NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \" ' {{ 7*7 }} {% x %} $x_1$ <!-- ]]> --> \x00\x1b\x85\ud800\ufffe"


class Reader(HTMLParser):
    """Asserts that every tag closes where it should and carries nothing that runs or fetches; keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED, tag
        for name, value in attrs:
            value = value or ""
            assert not name.startswith("on") and name not in ("src", "action", "xlink:href", "srcset"), (tag, name)
            assert name != "href" or (tag == "use" and value.startswith("#")), (tag, value)
            assert name == "aria-label" or "javascript:" not in value and "url(" not in value.replace("url(#", ""), (
                value
            )
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def tags(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]
