package intercept

import (
	"bytes"
	"net/netip"
	"testing"
)

func TestParseSockaddr(t *testing.T) {
	in := []byte{2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}
	unspec := append([]byte{0, 0}, in[2:]...)
	unspecAny := []byte{0, 0, 0x1f, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	in6 := append([]byte{10, 0, 0x1f, 0x90, 0, 0, 0, 5}, netip.MustParseAddr("fe80::1").AsSlice()...)
	scoped := append(bytes.Clone(in6), 3, 0, 0, 0)
	for _, tt := range []struct {
		name string
		in   []byte
		want sockaddr
	}{
		{"nothing", nil, sockaddr{}},
		{"half a family", []byte{2}, sockaddr{}},
		{"family alone", []byte{2, 0}, sockaddr{family: 2}},
		{"sockaddr_in", in, sockaddr{family: 2, addr: netip.MustParseAddrPort("127.0.0.1:8080")}},
		{"sockaddr_in, a byte short", in[:15], sockaddr{family: 2}},
		{"sockaddr_in in a sockaddr_storage", append(bytes.Clone(in), make([]byte, 112)...), sockaddr{family: 2, addr: netip.MustParseAddrPort("127.0.0.1:8080")}},
		{"AF_UNSPEC, any", unspecAny, sockaddr{addr: netip.MustParseAddrPort("0.0.0.0:8080")}},
		{"AF_UNSPEC, an address", unspec, sockaddr{}},
		{"sockaddr_in6 without scope", in6, sockaddr{family: 10, addr: netip.MustParseAddrPort("[fe80::1]:8080"), flowInfo: 5}},
		{"sockaddr_in6 with scope", scoped, sockaddr{family: 10, addr: netip.MustParseAddrPort("[fe80::1]:8080"), flowInfo: 5, scopeID: 3}},
		{"sockaddr_in6, a byte short", in6[:23], sockaddr{family: 10}},
		{"sockaddr_un", append([]byte{1, 0}, "/run/some/socket"...), sockaddr{family: 1}},
		{"unknown family", append([]byte{0xff, 0xff}, make([]byte, 30)...), sockaddr{family: 0xffff}},
	} {
		if got := parseSockaddr(tt.in); got != tt.want {
			t.Errorf("%s: %+v, not %+v", tt.name, got, tt.want)
		}
	}
}

func FuzzParseSockaddr(f *testing.F) {
	f.Add([]byte{2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(append([]byte{10, 0}, make([]byte, 26)...))
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		s := parseSockaddr(b)
		if !s.addr.IsValid() {
			return
		}
		switch {
		case s.family == afInet6 && s.addr.Addr().Is6() && len(b) >= 24:
		case s.family == afInet && s.addr.Addr().Is4() && len(b) >= 16:
		case s.family == afUnspec && s.addr.Addr() == netip.IPv4Unspecified() && len(b) >= 16:
		default:
			t.Errorf("%v: %+v", b, s)
		}
	})
}
