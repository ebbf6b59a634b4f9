package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
)

// parseURL reads what a person types for an HTTP server, down to a bare port.
func parseURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, errors.New("no URL: name a server, such as http://127.0.0.1:8080/")
	}
	full := s
	if _, err := strconv.ParseUint(s, 10, 16); err == nil {
		full = ":" + s
	}
	if !strings.Contains(full, "://") {
		full = "http://" + full
	}
	u, err := url.Parse(full)
	if err != nil {
		var bad *url.Error
		if errors.As(err, &bad) {
			err = bad.Err
		}
		return nil, fmt.Errorf("%q is not a URL: %w", s, err)
	}
	switch u.Scheme {
	case "http":
	case "https":
		return nil, fmt.Errorf("%q is https, which isn't supported: aim at the server's plain HTTP port", s)
	default:
		return nil, fmt.Errorf("%q: scheme %s isn't supported: use http", s, u.Scheme)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return nil, fmt.Errorf("%q: port %s is out of range: use 1 to 65535", s, p)
		}
	}
	if u.Hostname() == "" {
		u.Host = "localhost" + u.Host
	}
	return u, nil
}

// writeRequest returns the bytes of one GET.
func writeRequest(u *url.URL, header http.Header) ([]byte, error) {
	r, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("User-Agent", "berth-load")
	if u.User != nil {
		password, _ := u.User.Password()
		r.SetBasicAuth(u.User.Username(), password)
	}
	for name, values := range header {
		if name == "" || strings.ContainsFunc(name, notToken) {
			return nil, fmt.Errorf("%q can't be the name of a header", name)
		}
		for _, v := range values {
			if strings.ContainsAny(v, "\r\n\x00") {
				return nil, fmt.Errorf("%q can't be the value of header %s", v, name)
			}
		}
		name = http.CanonicalHeaderKey(name)
		if name == "Host" && len(values) > 0 {
			r.Host = values[0]
			continue
		}
		r.Header[name] = values
	}
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		return nil, fmt.Errorf("the request can't be written: %w", err)
	}
	return b.Bytes(), nil
}

// notToken reports whether r can't be part of a header's name (RFC 9110, 5.6.2).
func notToken(r rune) bool {
	return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
}

// resolve finds the one address that all connections go to. A name with addresses of both families is taken to mean
// the IPv4 one: to try the other after a failure would hide the failure.
func resolve(ctx context.Context, u *url.URL) (netip.AddrPort, error) {
	port := uint64(80)
	if p := u.Port(); p != "" {
		port, _ = strconv.ParseUint(p, 10, 16)
	}
	host := u.Hostname()
	ip, err := netip.ParseAddr(host)
	if err != nil {
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("no address for %s: %w", host, err)
		}
		ip = ips[0]
		for _, other := range ips {
			if other.Unmap().Is4() {
				ip = other
				break
			}
		}
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}

// A spread hands out source addresses in 127.0.0.0/8. One source address has 28,232 ephemeral ports by default, and
// connecting slows down two hundredfold when half of them are in use or in TIME_WAIT.
type spread struct {
	target netip.Addr
	next   atomic.Uint32
}

// newSpread returns nil for a target that isn't in 127.0.0.0/8.
func newSpread(target netip.Addr) (*spread, error) {
	if !target.Is4() || !target.IsLoopback() {
		return nil, nil
	}
	s := &spread{target: target}
	// Begin anywhere, so that one run doesn't meet the TIME_WAITs of the run before.
	s.next.Store(rand.Uint32())
	probe, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(s.source(), 0)))
	if err != nil {
		return nil, fmt.Errorf("connections can't be spread over 127.0.0.0/8 here, so ask for no spread: %w", err)
	}
	return s, probe.Close()
}

// source returns the next address to connect from. It is never the target's, so a connection can't meet itself.
func (s *spread) source() netip.Addr {
	for {
		n := s.next.Add(1)
		// 127.64.0.1 to 127.127.255.254, clear of the addresses that people give to servers and resolvers.
		a := netip.AddrFrom4([4]byte{127, 64 | byte(n>>14)&63, byte(n >> 7 & 127), 1 + byte(n&127)})
		if a != s.target {
			return a
		}
	}
}
