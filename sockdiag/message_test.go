package sockdiag

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

// reply is a made-up reply of the kernel's.
func reply(family Family, attrs ...[]byte) []byte {
	b := make([]byte, replyLen)
	b[0], b[1], b[2], b[3] = byte(family), byte(TimeWait), byte(TimeWaitTimer), 2
	binary.BigEndian.PutUint16(b[4:], 8080)
	binary.BigEndian.PutUint16(b[6:], 40000)
	copy(b[8:], []byte{127, 0, 0, 1})
	copy(b[24:], []byte{127, 0, 0, 2})
	binary.NativeEndian.PutUint32(b[44:], 7)
	binary.NativeEndian.PutUint32(b[48:], 1)
	binary.NativeEndian.PutUint32(b[52:], 59000)
	return append(b, bytes.Join(attrs, nil)...)
}

func attr(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(attrHeaderLen+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func TestParse(t *testing.T) {
	info := make([]byte, 232)
	info[0] = byte(Established)
	binary.NativeEndian.PutUint64(info[infoBytesReceived:], 1<<40)
	var s Socket
	if err := parse(reply(INET, attr(attrInfo, info...), attr(attrV6Only, 1), attr(attrCgroupID, 9, 0, 0, 0, 0, 0, 0, 0)), &s); err != nil {
		t.Fatal(err)
	}
	if s.Local != netip.MustParseAddrPort("127.0.0.1:8080") || s.Remote != netip.MustParseAddrPort("127.0.0.2:40000") ||
		s.Cookie != 1<<32|7 || s.Expires != 59*time.Second || s.Timer != TimeWaitTimer || s.Retransmits != 2 ||
		!s.HasInfo || s.Info.BytesReceived != 1<<40 || !s.V6Only {
		t.Errorf("unexpected socket %+v", s)
	}
	// TCP_INFO of an older kernel ends earlier.
	if err := parse(reply(INET, attr(attrInfo, info[:104]...)), &s); err != nil || !s.HasInfo || s.Info.BytesReceived != 0 {
		t.Errorf("short TCP_INFO: %+v, %v", s.Info, err)
	}
	for name, b := range map[string][]byte{
		"short":                reply(INET)[:replyLen-1],
		"family":               reply(1),
		"attribute too long":   append(reply(INET), 9, 0, 2, 0),
		"attribute of nothing": append(reply(INET), 0, 0, 0, 0),
	} {
		if err := parse(b, &s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParseAllocatesNothing(t *testing.T) {
	b := reply(INET6, attr(attrInfo, make([]byte, 232)...), attr(attrV6Only, 1))
	var s Socket
	if n := testing.AllocsPerRun(100, func() { _ = parse(b, &s) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(reply(INET))
	f.Add(reply(INET6, attr(attrV6Only, 1), attr(attrInfo, make([]byte, 232)...)))
	f.Add(reply(INET, attr(attrCgroupID, 1, 2, 3), attr(attrProtocol)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s Socket
		if parse(b, &s) != nil {
			return
		}
		if s.Local.Addr().Is4In6() || s.Remote.Addr().Is4In6() {
			t.Errorf("a v4-mapped address is left in %+v", s)
		}
		// What was read must name the same socket when it is asked for.
		request := appendRequest(nil, s.Family, 0, true, s.ID())
		if !bytes.Equal(request[8:12], b[4:8]) {
			t.Errorf("ports %x became %x", b[4:8], request[8:12])
		}
	})
}
